"""The package format: a manifest, a compiled library and weights, in a folder or in one file."""

from optimizer.package.manifest import Manifest
from optimizer.package.reader import Package, open_package, verify_package
from optimizer.package.writer import Weight, require_replaceable, write_package

__all__ = ["Manifest", "Package", "Weight", "open_package", "require_replaceable", "verify_package", "write_package"]
