"""Benchmarks of clipweld against other libraries that people use today, on this machine."""
