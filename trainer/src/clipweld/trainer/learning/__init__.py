"""Learning one task: the steps, what interrupts and resumes them, and what they cost."""
