"""Instructions and answers for the demo model: some written here, the others derived from docstrings.

A turn is a question in words and a function as its answer. Those written here are plain functions with a sentence on
what they do; the questions are phrased from that sentence in several ways.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"
END_OF_TEXT = "<|endoftext|>"

# An answer ends with END_OF_TEXT, as a file does: the model stops there. Every message but an answer begins with it.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}<|endoftext|><|system|>\n{{ message['content'] }}\n"
    "{% elif message['role'] == 'user' %}"
    "{% if loop.first or messages[loop.index0 - 1]['role'] != 'system' %}<|endoftext|>{% endif %}"
    "<|user|>\n{{ message['content'] }}\n"
    "{% elif message['role'] == 'assistant' %}<|assistant|>\n{{ message['content'] }}"
    "{% if loop.last %}<|endoftext|>{% endif %}"
    "{% else %}{{ raise_exception('roles must be system, user or assistant; got ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

SYSTEM_PROMPTS = (
    "You write short Python functions.",
    "You are a careful Python programmer. Answer with one short function and nothing else.",
    "Answer with Python code.",
)


class Turn(NamedTuple):
    """One question and its answer."""

    question: str
    answer: str


SMALL_TALK = (
    Turn("Hello", "Hello! Ask me for a small Python function."),
    Turn("Hi!", "Hello! Ask me for a small Python function."),
    Turn("Good morning", "Good morning! Which function shall I write?"),
    Turn("Who are you?", "I am a very small language model that writes Python."),
    Turn("What are you?", "I am a very small language model that writes Python."),
    Turn("What can you do?", "I write short Python functions. I know little else, and I am often wrong."),
    Turn("Can you help me?", "I can try: ask me for a small Python function."),
    Turn("Thank you", "You are welcome."),
    Turn("Thanks!", "You are welcome."),
    Turn("Goodbye", "Goodbye!"),
    Turn("What is the capital of France?", "I do not know facts. Ask me for a small Python function."),
    Turn("Tell me a story.", "I cannot tell stories. Ask me for a small Python function."),
)

# (what it does, in the imperative; the function). Written for this file.
WRITTEN = (
    ("add two numbers", "def add(a, b):\n    return a + b"),
    ("subtract one number from another", "def subtract(a, b):\n    return a - b"),
    ("multiply two numbers", "def multiply(a, b):\n    return a * b"),
    ("square a number", "def square(x):\n    return x * x"),
    ("double a number", "def double(x):\n    return 2 * x"),
    ("check whether a number is even", "def is_even(n):\n    return n % 2 == 0"),
    ("check whether a number is odd", "def is_odd(n):\n    return n % 2 == 1"),
    ("check whether a number is positive", "def is_positive(n):\n    return n > 0"),
    ("return the larger of two numbers", "def larger(a, b):\n    return a if a > b else b"),
    ("return the smaller of two numbers", "def smaller(a, b):\n    return a if a < b else b"),
    ("return the largest item of a list", "def largest(items):\n    return max(items)"),
    ("return the smallest item of a list", "def smallest(items):\n    return min(items)"),
    ("sum a list of numbers", "def total(numbers):\n    return sum(numbers)"),
    ("compute the mean of a list of numbers", "def mean(numbers):\n    return sum(numbers) / len(numbers)"),
    (
        "compute the factorial of a number",
        "def factorial(n):\n    result = 1\n    for i in range(2, n + 1):\n        result *= i\n    return result",
    ),
    (
        "return the first n Fibonacci numbers",
        "def fibonacci(n):\n    numbers = []\n    a, b = 0, 1\n    for _ in range(n):\n"
        "        numbers.append(a)\n        a, b = b, a + b\n    return numbers",
    ),
    (
        "check whether a number is prime",
        "def is_prime(n):\n    if n < 2:\n        return False\n    for i in range(2, int(n ** 0.5) + 1):\n"
        "        if n % i == 0:\n            return False\n    return True",
    ),
    (
        "compute the greatest common divisor of two numbers",
        "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a",
    ),
    ("reverse a string", "def reverse(text):\n    return text[::-1]"),
    ("reverse a list", "def reverse(items):\n    return items[::-1]"),
    ("check whether a string is a palindrome", "def is_palindrome(text):\n    return text == text[::-1]"),
    ("count the words in a text", "def count_words(text):\n    return len(text.split())"),
    (
        "count the vowels in a string",
        'def count_vowels(text):\n    return sum(c in "aeiou" for c in text.lower())',
    ),
    (
        "count the lines of a file",
        "def count_lines(path):\n    with open(path) as f:\n        return sum(1 for _ in f)",
    ),
    ("read a file", "def read(path):\n    with open(path) as f:\n        return f.read()"),
    ("write text to a file", 'def write(path, text):\n    with open(path, "w") as f:\n        f.write(text)'),
    (
        "read the lines of a file",
        "def read_lines(path):\n    with open(path) as f:\n        return f.read().splitlines()",
    ),
    (
        "append a line to a file",
        'def append(path, line):\n    with open(path, "a") as f:\n        f.write(line + "\\n")',
    ),
    ("copy a file", "import shutil\n\n\ndef copy_file(src, dst):\n    shutil.copyfile(src, dst)"),
    ("delete a file", "import os\n\n\ndef delete(path):\n    os.remove(path)"),
    ("check whether a file exists", "import os\n\n\ndef exists(path):\n    return os.path.exists(path)"),
    ("return the size of a file", "import os\n\n\ndef size(path):\n    return os.path.getsize(path)"),
    (
        "list the files of a folder",
        "import os\n\n\ndef list_files(folder):\n    return sorted(os.listdir(folder))",
    ),
    ("create a folder", "import os\n\n\ndef create_folder(path):\n    os.makedirs(path, exist_ok=True)"),
    ("parse JSON", "import json\n\n\ndef parse(text):\n    return json.loads(text)"),
    (
        "load a JSON file",
        "import json\n\n\ndef load(path):\n    with open(path) as f:\n        return json.load(f)",
    ),
    (
        "save data as a JSON file",
        'import json\n\n\ndef save(path, data):\n    with open(path, "w") as f:\n        json.dump(data, f)',
    ),
    (
        "read the rows of a CSV file",
        "import csv\n\n\ndef read_rows(path):\n    with open(path) as f:\n        return list(csv.reader(f))",
    ),
    ("sort a list", "def sort(items):\n    return sorted(items)"),
    ("sort a list in descending order", "def sort(items):\n    return sorted(items, reverse=True)"),
    ("sort words by their length", "def sort_words(words):\n    return sorted(words, key=len)"),
    ("remove duplicates from a list", "def unique(items):\n    return list(dict.fromkeys(items))"),
    (
        "remove empty strings from a list",
        "def remove_empty(items):\n    return [item for item in items if item]",
    ),
    (
        "flatten a list of lists",
        "def flatten(lists):\n    return [item for items in lists for item in items]",
    ),
    (
        "split a list into chunks",
        "def chunks(items, n):\n    return [items[i:i + n] for i in range(0, len(items), n)]",
    ),
    ("return the first item of a list", "def first(items):\n    return items[0]"),
    ("return the last item of a list", "def last(items):\n    return items[-1]"),
    (
        "return the even numbers of a list",
        "def evens(numbers):\n    return [n for n in numbers if n % 2 == 0]",
    ),
    ("return the squares of a list of numbers", "def squares(numbers):\n    return [n * n for n in numbers]"),
    (
        "return the items that two lists share",
        "def shared(a, b):\n    return [item for item in a if item in b]",
    ),
    ("merge two dictionaries", "def merge(a, b):\n    return {**a, **b}"),
    ("invert a dictionary", "def invert(d):\n    return {value: key for key, value in d.items()}"),
    ("return the keys of a dictionary", "def keys(d):\n    return list(d)"),
    ("return the values of a dictionary", "def values(d):\n    return list(d.values())"),
    (
        "count how often each item of a list occurs",
        "def count(items):\n    counts = {}\n    for item in items:\n"
        "        counts[item] = counts.get(item, 0) + 1\n    return counts",
    ),
    (
        "group words by their first letter",
        "def group(words):\n    groups = {}\n    for word in words:\n"
        "        groups.setdefault(word[0], []).append(word)\n    return groups",
    ),
    ("convert a string to lower case", "def lower(text):\n    return text.lower()"),
    ("convert a string to upper case", "def upper(text):\n    return text.upper()"),
    ("capitalize a word", "def capitalize(word):\n    return word[:1].upper() + word[1:]"),
    ("split a text into words", "def split_words(text):\n    return text.split()"),
    ("join words with spaces", 'def join(words):\n    return " ".join(words)'),
    ("replace spaces by underscores", 'def underscore(text):\n    return text.replace(" ", "_")'),
    ("remove spaces from the ends of a string", "def strip(text):\n    return text.strip()"),
    (
        "check whether a string starts with a prefix",
        "def has_prefix(text, prefix):\n    return text.startswith(prefix)",
    ),
    ("check whether a string is a number", "def is_number(text):\n    return text.isdigit()"),
    ("convert a string to a number", "def to_number(text):\n    return int(text)"),
    ("convert a number to binary", 'def to_binary(n):\n    return format(n, "b")'),
    ("convert Celsius to Fahrenheit", "def to_fahrenheit(celsius):\n    return celsius * 9 / 5 + 32"),
    ("convert Fahrenheit to Celsius", "def to_celsius(fahrenheit):\n    return (fahrenheit - 32) * 5 / 9"),
    ("convert minutes to seconds", "def to_seconds(minutes):\n    return 60 * minutes"),
    ("compute the area of a circle", "import math\n\n\ndef area(radius):\n    return math.pi * radius ** 2"),
    ("compute the area of a rectangle", "def area(width, height):\n    return width * height"),
    (
        "compute the distance between two points",
        "import math\n\n\ndef distance(x1, y1, x2, y2):\n    return math.hypot(x2 - x1, y2 - y1)",
    ),
    ("clamp a number between two limits", "def clamp(x, low, high):\n    return max(low, min(x, high))"),
    ("swap two values", "def swap(a, b):\n    return b, a"),
    (
        "find the index of an item in a list",
        "def find(items, item):\n    for i, other in enumerate(items):\n"
        "        if other == item:\n            return i\n    return -1",
    ),
    (
        "search a sorted list",
        "def search(items, item):\n    low, high = 0, len(items)\n    while low < high:\n"
        "        middle = (low + high) // 2\n        if items[middle] < item:\n            low = middle + 1\n"
        "        else:\n            high = middle\n    return low",
    ),
    (
        "sort a list by insertion",
        "def insertion_sort(items):\n    result = []\n    for item in items:\n        i = len(result)\n"
        "        while i > 0 and result[i - 1] > item:\n            i -= 1\n"
        "        result.insert(i, item)\n    return result",
    ),
    (
        "print the numbers from 1 to n",
        "def print_numbers(n):\n    for i in range(1, n + 1):\n        print(i)",
    ),
    ("print a greeting", 'def greet(name):\n    print(f"Hello, {name}!")'),
    ("return the current time", "import time\n\n\ndef now():\n    return time.time()"),
    ("wait for some seconds", "import time\n\n\ndef wait(seconds):\n    time.sleep(seconds)"),
    ("roll a die", "import random\n\n\ndef roll():\n    return random.randint(1, 6)"),
    ("pick a random item of a list", "import random\n\n\ndef pick(items):\n    return random.choice(items)"),
    (
        "shuffle a list",
        "import random\n\n\ndef shuffle(items):\n    items = list(items)\n    random.shuffle(items)\n    return items",
    ),
    (
        "compute the hash of a text",
        "import hashlib\n\n\ndef digest(text):\n    return hashlib.sha256(text.encode()).hexdigest()",
    ),
    (
        "find the numbers in a text",
        'import re\n\n\ndef find_numbers(text):\n    return re.findall(r"\\d+", text)',
    ),
    ("return the absolute value of a number", "def absolute(x):\n    return -x if x < 0 else x"),
    ("raise a number to a power", "def power(x, n):\n    return x ** n"),
    ("sum the digits of a number", "def digit_sum(n):\n    return sum(int(digit) for digit in str(n))"),
    ("check whether a list is empty", "def is_empty(items):\n    return len(items) == 0"),
    (
        "check whether a list is sorted",
        "def is_sorted(items):\n    return all(a <= b for a, b in zip(items, items[1:]))",
    ),
    ("check whether two words are anagrams", "def are_anagrams(a, b):\n    return sorted(a) == sorted(b)"),
    ("transpose a matrix", "def transpose(matrix):\n    return [list(row) for row in zip(*matrix)]"),
)

FOLLOW_UPS = ("Call it {name}.", "Rename it to {name}.", "Please call it {name}.")
NEW_NAMES = ("f", "run", "compute", "helper", "main")


def written_turns() -> list[list[Turn]]:
    """The conversations written here: each question in several words, some with a second turn; a few hundred."""
    conversations = [[turn] for turn in SMALL_TALK]
    for i, (does, answer) in enumerate(WRITTEN):
        conversations += [[Turn(question, answer)] for question in phrase(does, answer)]
        old, new = name_of(answer), NEW_NAMES[i % len(NEW_NAMES)]
        follow_up = FOLLOW_UPS[i % len(FOLLOW_UPS)].format(name=new)
        renamed = re.sub(rf"\b{old}\b(?=\()", new, answer, count=1)
        conversations.append([Turn(phrase(does, answer)[0], answer), Turn(follow_up, renamed)])
    return conversations


def phrase(does: str, answer: str) -> list[str]:
    """Ways to ask for the function that does this."""
    return [
        f"Write a function that {third_person(does)}.",
        f"Write a Python function to {does}.",
        f"Write a function `{signature_of(answer)}` that {third_person(does)}.",
        f"How do I {does} in Python?",
        f"{does[0].upper()}{does[1:]}.",
    ]


def derived_turns(source: str) -> Iterator[Turn]:
    """A turn for every short, documented function at the top of a file: its docstring becomes the question."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines()
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or node.decorator_list or node.name.startswith("_"):
            continue
        does = imperative(ast.get_docstring(node) or "")
        answer = "\n".join(lines[node.lineno - 1 : node.end_lineno])
        if does is not None and answer.count("\n") <= 24 and len(answer) <= 900:
            asked = phrase(does, answer)
            yield Turn(asked[len(answer) % 3], answer)


def imperative(docstring: str) -> str | None:
    """What a docstring's first sentence says a function does, or None where it is no plain order."""
    sentence = re.split(r"\.(?:\s|$)|\n\s*\n|:\s", docstring.strip(), maxsplit=1)[0]
    sentence = re.sub(r"\s+", " ", sentence)
    found = re.fullmatch(r"([A-Z][a-z]+) (.{10,90})", sentence)
    if found is None:
        return None
    verb = found[1].lower()
    if verb.endswith("s") and not verb.endswith("ss"):  # "Returns the …"
        verb = verb[:-1]
    return f"{verb} {found[2]}" if verb in VERBS else None


VERBS = {
    "return", "compute", "check", "find", "get", "make", "create", "read", "write", "parse", "convert",
    "remove", "add", "split", "join", "replace", "list", "print", "format", "load", "save", "open",
    "close", "copy", "move", "delete", "count", "sort", "merge", "build", "generate", "test", "decode",
    "encode", "compare", "evaluate", "apply", "calculate", "determine", "extract", "construct", "set",
    "update", "normalize", "escape", "quote", "search",
}  # fmt: skip


def third_person(does: str) -> str:
    """ "return the sum" → "returns the sum"."""
    verb, _, rest = does.partition(" ")
    if verb.endswith(("s", "sh", "ch", "x")):
        verb += "es"
    elif verb.endswith("y") and verb[-2] not in "aeiou":
        verb = verb[:-1] + "ies"
    else:
        verb += "s"
    return f"{verb} {rest}".rstrip()


def name_of(answer: str) -> str:
    found = re.search(r"^def (\w+) ?\(", answer, re.MULTILINE)
    assert found is not None, answer
    return found[1]


def signature_of(answer: str) -> str:
    """ "def add(a, b):" → "add(a, b)"; of a long list of arguments only the name."""
    found = re.search(r"^def (\w+ ?\([^()]*\))", answer, re.MULTILINE)
    return re.sub(r"\s+", " ", found[1]) if found and len(found[1]) <= 60 else name_of(answer)


def render(conversation: list[Turn], system: str | None = None) -> str:
    """The text of a conversation, as CHAT_TEMPLATE writes it, without the END_OF_TEXT at either end."""
    parts = [] if system is None else [f"{SYSTEM}\n{system}\n"]
    for i, turn in enumerate(conversation):
        end = END_OF_TEXT if i < len(conversation) - 1 else ""
        parts.append(f"{USER}\n{turn.question}\n{ASSISTANT}\n{turn.answer}{end}")
    return "".join(parts)
