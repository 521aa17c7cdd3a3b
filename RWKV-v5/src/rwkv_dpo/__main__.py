"""`python -m rwkv_dpo` is `rwkv-dpo`."""

from rwkv_dpo.commands.door import main

if __name__ == "__main__":
    main()
