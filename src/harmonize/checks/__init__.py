"""What ``harmonize doctor`` looks at: each check is a generator of findings, and cleans up after itself."""
