"""Science at training scale: what methods reach, one command each."""
