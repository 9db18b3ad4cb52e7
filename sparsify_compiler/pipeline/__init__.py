"""The stages of a compile run, from a model in memory to the output folder and its report."""
