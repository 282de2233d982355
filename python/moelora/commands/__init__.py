"""The commands of `python -m moelora`: a module each, named as the command, and their helpers beside them.

The library, in `moelora` itself, imports nothing from here.
"""
