"""Data sets, heterogeneous splits and reproducible sampling."""
