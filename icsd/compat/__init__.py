"""The distillation losses of other projects by fused kernels, with the signatures of the originals.

Each module has the name of a project and the classes of that project. `docs/compat` has a page for each of them. The
formulas are those of the originals; the code is not.
"""
