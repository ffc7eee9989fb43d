"""clipweld beside what people use today, on this machine."""
