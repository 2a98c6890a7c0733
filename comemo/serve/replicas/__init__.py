"""Several engines behind one address: who answers what, and what is repeated. Nothing of Ray."""
