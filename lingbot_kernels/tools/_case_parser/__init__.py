"""Static evaluator behind ``diffusion_case_parser.py``: reads a case config without importing it.

Standard library only; every module here uses relative imports, so the package also loads by path.
"""
