"""Learning several tasks in a row, with our method and with the baselines."""
