"""The native CPU backend: C++ kernels of our own behind ctypes, and the ops that call them.

Nothing here computes; without the compiled library the reference ops stand in.
"""
