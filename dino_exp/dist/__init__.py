"""Several processes that train one model together: which one this is, and how they speak to each other."""
