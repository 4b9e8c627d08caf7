"""Models that decide for each input how much of every task they take."""
