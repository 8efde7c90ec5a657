"""How the miniature was trained: ``fluxedu train --all`` runs every stage of this package in order."""
