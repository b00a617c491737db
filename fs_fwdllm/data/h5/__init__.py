"""Data and partition files of FedNLP and FwdLLM (HDF5): reading, writing, dealing rows to clients."""
