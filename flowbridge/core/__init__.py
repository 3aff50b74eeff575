"""What every room of flowbridge shares: the Potential contract, model files, weighted samples, units, errors."""
