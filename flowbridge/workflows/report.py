def write(*args):
    return None
