"""What is done to a graph: prune, re-solve, re-estimate, lower. Measured verdicts come in as arguments."""
