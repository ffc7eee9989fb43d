"""What stands behind RESULTS.md and TRUST.md: studies, benchmarks, trust commands, and their records."""

import clipweld.exporter  # noqa: F401 - so that ONNX Runtime reports to nobody, whatever is imported first
