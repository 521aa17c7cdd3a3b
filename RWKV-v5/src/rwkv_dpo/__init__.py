"""Direct Preference Optimization for RWKV language models. Floors and contracts: CONTRIBUTING.md."""
