"""Studies: arms that are cut, trained and scored side by side, declared in one file and proved from their ledgers."""
