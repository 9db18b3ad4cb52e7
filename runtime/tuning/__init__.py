"""Which kernel runs a weight: self-tests, timing, verdicts, and the cache that keeps them."""
