"""The marker of the four proofs, whichever of their folders is tested alone."""


def pytest_configure(config):
    config.addinivalue_line("markers", "proof(name): one of the ways a GPU kernel is proven without a GPU")
