"""Text from a language model on pages: several prompts served together, then one streamed.

    python examples/generate.py [FOLDER]

FOLDER is any Hugging Face model folder; without one the embedded model writes, which knows Python only.
"""

import sys

import quire

llm = quire.LLM(*sys.argv[1:2], num_pages=256)

prompts = ["def fibonacci(n):\n", "class Stack:\n", "import os\n"]
for output in llm.generate(prompts, quire.SamplingParams(max_tokens=24)):
    print(f"--- {output.finish_reason} after {len(output.token_ids)} tokens")
    print(output.prompt + output.text)

print("--- streamed, with a draw that seed=1 repeats")
drawn = quire.SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=24)
for delta in llm.stream("def main():\n", drawn):
    print(delta.text, end="", flush=True)
print()
