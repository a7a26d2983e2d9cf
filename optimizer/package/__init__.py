"""The package format: a manifest, a compiled library and weights, in a folder or in one file.

Who loads a package imports `reader` alone: what writes one would come before its first token.
"""
