"""The command line as a module: `python -m sparsify_compiler` is `sparsify-compiler`."""

from sparsify_compiler.cli import main

if __name__ == "__main__":
    main()
