"""Published weights in and out: one table of names per family, used in both directions."""
