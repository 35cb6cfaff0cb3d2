"""A hundred pairs of answers with the mathematical truth: (answer, gold, equal). Half are unequal."""

EQUAL = [
    ('7', '7'), ('025', '25'), ('+25', '25'), ('-0', '0'), ('1000', '1{,}000'),
    ('25.0', '25'), ('0.5', r'\frac{1}{2}'), (r'\frac12', r'\frac{1}{2}'), ('1/2', r'\frac{1}{2}'),
    (r'\dfrac{3}{4}', r'\frac{3}{4}'), (r'\frac{6}{8}', r'\frac{3}{4}'), ('0.75', '3/4'),
    (r'-\frac{2}{3}', r'\frac{-2}{3}'), (r'\frac{2}{-3}', r'-\frac{2}{3}'), ('1.25', r'\frac{5}{4}'),
    (r'\sqrt{8}', r'2\sqrt{2}'), (r'\frac{1}{\sqrt{2}}', r'\frac{\sqrt{2}}{2}'), (r'\sqrt{16}', '4'),
    (r'\sqrt[3]{27}', '3'), ('2^{10}', '1024'), ('3^{-1}', r'\frac{1}{3}'), ('5!', '120'),
    (r'\binom{5}{2}', '10'), (r'2\cdot 3', '6'), (r'2\times 3', '6'), (r'\pi/2', r'\frac{\pi}{2}'),
    (r'\frac{2\pi}{4}', r'\frac{\pi}{2}'), ('x+1', '1+x'), ('(x+1)^2', 'x^2+2x+1'),
    ('2x', r'x\cdot 2'), (r'\frac{x}{2}', '0.5x'), ('(x-1)(x+1)', 'x^2-1'),
    ('(3, 4)', '(3,4)'), (r'\left(3,4\right)', '(3,4)'), (r'(\frac{1}{2}, 2)', '(0.5, 2)'),
    (r'\{1,2,3\}', r'\{3,2,1\}'), ('1,2,3', '3,2,1'), ('[0,1]', r'\left[0,1\right]'),
    (r'(-\infty, 2)', r'(-\infty,2)'), (r'[0,1]\cup[2,3]', r'[2,3]\cup[0,1]'),
    (r'\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}', r'\begin{pmatrix}1&2\\3&4\end{pmatrix}'),
    (r'\text{east}', 'east'), (r'\log_2 8', '3'), (r'\sin(\pi/6)', r'\frac{1}{2}'),
    ('3+4i', '4i+3'), ('e^0', '1'), (r'$12$', '12'), (r'12\text{ cm}', '12'),
    (r'90^\circ', '90'), ('x = 5', '5'),
]  # fmt: skip

UNEQUAL = [
    ('7', '8'), ('-7', '7'), ('25', '52'), ('1', '10'), ('0', '-1'),
    ('0.5', r'\frac{1}{3}'), ('0.3', r'\frac{1}{3}'), ('0.3333', r'\frac{1}{3}'), ('3.14', r'\pi'),
    (r'\frac{22}{7}', r'\pi'), (r'\frac{3}{4}', r'\frac{4}{3}'), (r'-\frac{2}{3}', r'\frac{2}{3}'),
    ('1.5', '15'), ('2.0001', '2'), ('1e3', '100'),
    (r'\sqrt{8}', '8'), (r'\sqrt{2}', '2'), (r'2\sqrt{3}', r'3\sqrt{2}'), (r'\sqrt[3]{9}', '3'),
    (r'\sqrt{a+b}', r'\sqrt{a}+\sqrt{b}'), ('2^{10}', '100'), ('2^{-1}', '-2'), ('5!', '60'),
    (r'\binom{5}{2}', '20'), (r'2\cdot 3', '5'), (r'\frac{\pi}{2}', r'\frac{\pi}{3}'), (r'\pi', '3'),
    ('x+1', 'x-1'), ('(x+1)^2', 'x^2+1'), ('2x', 'x^2'), ('2x', '2y'), ('x^2-1', '(x-1)^2'),
    ('(3,4)', '(4,3)'), ('(3,4)', '(3,5)'), ('(1,2)', '(1,2,3)'), (r'\{1,2\}', r'\{1,3\}'),
    ('1,2', '1,2,3'), ('[0,1]', '(0,1)'), ('[0,1]', '[0,2]'), (r'(-\infty,2)', r'(2,\infty)'),
    (r'[0,1]\cup[2,3]', '[0,3]'),
    (r'\begin{pmatrix}1&2\\3&4\end{pmatrix}', r'\begin{pmatrix}1&3\\2&4\end{pmatrix}'),
    (r'\text{east}', r'\text{west}'), (r'\log_2 8', '4'), (r'\sin(\pi/6)', r'\frac{\sqrt{3}}{2}'),
    ('3+4i', '3-4i'), ('i', '-i'), ('x = 5', '6'), ('12', r'\frac{1}{12}'), ('', '0'),
]  # fmt: skip

PAIRS = [(a, b, True) for a, b in EQUAL] + [(a, b, False) for a, b in UNEQUAL]

# Equal, but the judge says no: a lone i is a letter to it, not the imaginary unit.
KNOWN_MISSES = [('i^2', '-1')]
