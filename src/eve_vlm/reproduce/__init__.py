"""The paper's claims at small scale: what is trained, how it is compared, and the report."""
