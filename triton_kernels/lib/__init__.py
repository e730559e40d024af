"""What the kernels share. A file beside this folder is an op, of the file's name; none of these is."""
