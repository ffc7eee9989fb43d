"""Learn several tasks one after another, with the expert pool or with a baseline."""
