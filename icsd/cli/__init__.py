"""The command line: ``icsd train | pretrain | sample | export | doctor | data``."""
