"""Worker of bench.attention: `ring` with the chunked kernel, over 4 simulated devices."""

from bench.sides.attention_ours import main

if __name__ == "__main__":
    main(simulate=4, seq=4)
