"""Where an answer is found in a text, and what is equal at sight."""

import time

import pytest

from retool_jax.tasks import answers


@pytest.mark.parametrize(
    'text, box',
    [
        (r'so \boxed{5}', '5'),
        (r'\boxed{1} then \boxed{2}', '2'),
        (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}'),
        (r'\boxed{\{1, 2\}} done}', r'\{1, 2\}'),
        (r'\boxed{\left\{ x \right.}', r'\left\{ x \right.'),
        (r'\boxed{a \\ {b}}', r'a \\ {b}'),
        (r'\boxed{\boxed{7}}', '7'),
        (r'\boxed{3} and \boxed{4', '3'),
        (r'\boxed {6}', '6'),
        (r'\boxed{}', ''),
        (r'} \boxed{8}', '8'),
        ('no box', None),
        (r'\boxed{open', None),
    ],
)
def test_the_last_complete_box_is_found_with_its_braces_matched(text, box):
    assert answers.last_box(text) == box


def test_a_megabyte_of_open_boxes_is_searched_in_linear_time():
    text = r'\boxed{' * 150_000
    start = time.perf_counter()
    assert answers.last_box(text) is None
    assert answers.last_box(text + '}') == ''
    assert time.perf_counter() - start < 10  # quadratic would take hours


@pytest.mark.parametrize(
    'text, found', [('a 3\nso 4 or -5.', '-5'), ('7\nnone here', None), ('', None), ('x = 12\n\n', '12')]
)
def test_the_lenient_integer_is_the_last_of_the_last_line(text, found):
    assert answers.last_integer(text) == found


@pytest.mark.parametrize(
    'a, b, equal',
    [
        (' 12 ', '12', True),
        ('$12$', '12', True),
        ('025', '25', True),
        ('-0', '0', True),
        ('\N{MINUS SIGN}3', '-3', True),
        ('12.', '12', True),
        (r'\dfrac{1}{2}', r'\frac{1}{2}', True),
        (r'\left( 3, 4 \right)', '(3,4)', True),
        (r'2\pi r', r'2\pi  r', True),
        (r'\pi r', r'\pir', None),
        (r'\leftarrow', 'arrow', None),
        ('12', '13', False),
        ('', '5', False),
        ('9' * 5000, '9' * 5000, True),
        ('9' * 5000, '9' * 4999, False),
        ('0.5', '1/2', None),
        ('5', '5.0', None),
    ],
)
def test_strings_and_plain_integers_decide_at_sight_and_nothing_else(a, b, equal):
    assert answers.equal_at_sight(a, b) is equal


@pytest.mark.parametrize(
    'answer, gold, same',
    [
        ('cab', 'abc', False), ('ABC', 'abc', True), (r'\text{Yes}', 'Yes', True), ('Yes.', 'Yes', True),
        ('yes or no', 'yes', False), ('', 'yes', False), ('1 2 3', '123', False), ('1  2\n3 4 ', '1 2\n3 4', True),
        (r'1 2 \\ 3 4', '1 2\n3 4', True), ('1 2 3 4', '1 2\n3 4', False), ('a,b , c', 'a, b, c', True),
        ('b, a', 'a, b', False), (r'$\dfrac{1}{2}$', '1/2', True), ('2/4', '1/2', False), ('0x1F', '0x1f', True),
        ('[1, 2.0]', '[1,2]', True), ("['-1.5', '2']", '["-1.50", "2"]', True), ('[2, 1]', '[1, 2]', False),
        ('[1]', '[true]', False), ('{"a": 1, "b": "x"}', '{"b":"x","a":1}', True), ('{"a": "X"}', '{"a": "x"}', False),
        (r'\{"a": 1\}', '{"a": 1}', True), ('[NaN]', '[1]', False), ('[A, B]', '[a,b]', True),
        ('[' * 5000, '[1]', False), ('[' + '9' * 5000 + ']', '[1]', False),
        ('grandmother', 'Grandmother', True), ('J7', 'J8', False),
    ],
)  # fmt: skip
def test_texts_are_the_same_but_for_case_spacing_and_typesetting(answer, gold, same):
    assert answers.same_text(answer, gold) is same
