"""Shapes of weights of real models, for tests and benchmarks alike."""

# Of SmolLM2-135M: keys and values, queries, into and out of the feed-forward
# network.
SMOLLM2_135M = ((576, 192), (576, 576), (576, 1536), (1536, 576))

# Into the feed-forward network of decoders of 1 and of 8 billion parameters.
LLAMA_1B = (2048, 8192)
LLAMA_8B = (4096, 14336)

# Tables of embeddings, [n, k], of SmolLM2-135M and of a decoder of 1 billion
# parameters.
TABLES = ((49152, 576), (32000, 2048))

# What the bench measures.
BENCH_SHAPES = ((576, 1536), (1536, 576), LLAMA_1B, LLAMA_8B)

# What tests can afford.
TEST_SHAPES = SMOLLM2_135M
