"""Measurements of the trainer, one command each. RESULTS.md reports them."""
