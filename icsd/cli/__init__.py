"""The command line: ``icsd train | sample | doctor | data``."""
