"""A simulated GPU on which the very sources of csrc/cuda run, compiled as C++; see simt.h and runtime.cpp."""
