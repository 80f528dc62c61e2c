"""The version of the installed package."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("rmdd")
except PackageNotFoundError:  # rmdd runs from a source tree and is not installed
    VERSION = "0+unknown"
