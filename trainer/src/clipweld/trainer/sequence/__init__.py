"""Learning several tasks in a row, by our method and by those that it is compared with."""
