"""The prompts of `quire demo`: beginnings of Python, from a line to a long page, in no order of length."""

PROMPTS = (
    # A
    '''def fibonacci(n):
    """Return the first n Fibonacci numbers."""
''',
    # B: long, so that the pages of one request stand beside the few of its neighbours
    '''"""A small library of shapes, and a canvas that draws them as text."""

import math
import sys


class Shape:
    """Base class of all shapes.

    A shape knows its position and its size, and can say whether a point is inside.
    """

    def __init__(self, x=0, y=0):
        self.x = x
        self.y = y

    def area(self):
        """Return the area of the shape."""
        raise NotImplementedError("subclasses must implement area()")

    def contains(self, x, y):
        """Return True if the point (x, y) is inside the shape."""
        raise NotImplementedError("subclasses must implement contains()")

    def move(self, dx, dy):
        """Move the shape by dx and dy, and return it."""
        self.x += dx
        self.y += dy
        return self

    def __repr__(self):
        return f"{type(self).__name__}(x={self.x!r}, y={self.y!r})"


class Circle(Shape):
    """A circle around (x, y)."""

    def __init__(self, x=0, y=0, radius=1):
        super().__init__(x, y)
        if radius < 0:
            raise ValueError("radius must not be negative")
        self.radius = radius

    def area(self):
        return math.pi * self.radius ** 2

    def contains(self, x, y):
        return math.hypot(x - self.x, y - self.y) <= self.radius


class Rectangle(Shape):
    """A rectangle whose lower left corner is (x, y)."""

    def __init__(self, x=0, y=0, width=1, height=1):
        super().__init__(x, y)
        self.width = width
        self.height = height

    def area(self):
''',
    # C
    '''class Stack:
    """A last-in, first-out stack of items."""

    def __init__(self):
        self._items = []

    def push(self, item):
        """Put an item on top of the stack."""
        self._items.append(item)

    def pop(self):
''',
    # D
    "import os\nimport sys\n",
    # E: the longest
    '''"""Read and write settings files.

A settings file is made of sections. Each section starts with a header in
brackets, and holds options, one per line, with a name and a value. Lines that
start with a number sign are comments. For example:

    [server]
    # where to listen
    host = localhost
    port = 8080

Values are strings; getint(), getfloat() and getboolean() convert them.
"""

import os
import re

__all__ = ["Error", "NoSectionError", "NoOptionError", "Settings"]


class Error(Exception):
    """Base class for the exceptions of this module."""

    def __init__(self, message=""):
        self.message = message
        Exception.__init__(self, message)

    def __repr__(self):
        return self.message

    __str__ = __repr__


class NoSectionError(Error):
    """Raised when no section matches a requested name."""

    def __init__(self, section):
        Error.__init__(self, "No section: %r" % (section,))
        self.section = section
        self.args = (section, )


class NoOptionError(Error):
    """Raised when a requested option was not found."""

    def __init__(self, option, section):
        Error.__init__(self, "No option %r in section: %r" % (option, section))
        self.option = option
        self.section = section
        self.args = (option, section)


class Settings:
    """The sections and options of a settings file."""

    _header = re.compile(r"\\[(?P<name>[^]]+)\\]")
    _option = re.compile(r"(?P<name>[^=]+?)\\s*=\\s*(?P<value>.*)$")

    def __init__(self, defaults=None):
        self._sections = {}
        self._defaults = dict(defaults or {})

    def sections(self):
        """Return a list of section names."""
        return list(self._sections.keys())

    def add_section(self, section):
        """Create a new section in the settings.

        Raise ValueError if a section by the specified name already exists.
        """
        if section in self._sections:
            raise ValueError("section %r already exists" % section)
        self._sections[section] = {}

    def has_section(self, section):
        """Indicate whether the named section is present."""
        return section in self._sections

    def options(self, section):
        """Return a list of option names for the given section name."""
        try:
            opts = self._sections[section].copy()
        except KeyError:
            raise NoSectionError(section) from None
        opts.update(self._defaults)
        return list(opts.keys())

    def get(self, section, option):
''',
    # F
    '''def read_lines(path, encoding="utf-8"):
    """Read a text file and return its lines.

    Empty lines are left out, and so is white space at the ends of a line.
    """
    with open(path, encoding=encoding) as f:
''',
    # G
    "for i in range(10):\n",
    # H
    """import unittest


class TestQueue(unittest.TestCase):
    def setUp(self):
        self.queue = Queue()

    def test_empty(self):
        self.assertTrue(self.queue.empty())
        self.assertEqual(len(self.queue), 0)

    def test_put_and_get(self):
        self.queue.put(1)
        self.queue.put(2)
""",
)
