"""The version of this package, said in this one place: a wheel's metadata are written from it."""

__version__ = "0.3.0"
