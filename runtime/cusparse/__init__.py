"""NVIDIA's cuSPARSE through ctypes: CSR, BSR and Blocked-ELL."""
