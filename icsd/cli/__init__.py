"""The command line: ``icsd train | pretrain | sample | doctor | data``."""
