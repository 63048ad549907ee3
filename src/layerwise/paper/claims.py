"""The paper's claims, each with the comparisons that it rests on."""

from dataclasses import dataclass

from layerwise.paper.comparisons import Amount, Comparison, Number, apart, better, falling, number
from layerwise.paper.rows import BY_NAME, ROWS, Row, row_run

DISTINCT = tuple({row_run(row, "paper", "layerwise"): row for row in reversed(ROWS)}.values())[
    ::-1
]  # of rows with one run, the first


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        sentence: the paper's, shortened at its ends only.
        meaning: what is compared, in our words.
        comparisons: all must hold; none where nothing that is measured could decide it.
        note: what a reader should know beside the verdict.
        reversed_sentence: the sentence names the two sides the other way round than its reason and
            the comparisons do.
    """

    key: str
    sentence: str
    meaning: str
    comparisons: tuple[Comparison, ...]
    note: str = ""
    reversed_sentence: bool = False

    @property
    def paper_agrees(self) -> bool | None:
        """Whether the paper's tables bear its sentence out, amounts included.

        None where the paper prints no numbers for it.
        """
        agreements = [
            comparison.paper_agrees
            for comparison in self.comparisons
            if comparison.paper_agrees is not None
        ]
        return all(agreements) and not self.reversed_sentence if agreements else None


@dataclass(frozen=True)
class Inconsistency:
    """Two rows of the paper with the same network, data and options, and different numbers.

    One run is measured for both.
    """

    rows: tuple[Row, Row]
    text: str


FAMILIES = (
    ("vgg16", "vgg16_e1", "vgg16_e2", "vgg16_e3"),
    ("vgg19", "vgg19_e1", "vgg19_e2", "vgg19_e3"),
)
VGG8B = ("vgg8b", "vgg8b_e1", "vgg8b_e2", "vgg8b_e3")
RESNET18, RESNET50 = (
    ("resnet18", "resnet18_e1", "resnet18_e2"),
    ("resnet50", "resnet50_e1", "resnet50_e2"),
)
BASE = ("resnet18", "resnet50")
# a number in a sentence stands for what rounds to it, and "nearly" for what does from below
ABOUT_1, ONE_TO_TWO, TWO, OVER_4, NEARLY_7 = (
    Amount("around 1 %", 0.5, 1.5),
    Amount("1–2 %", 0.5, 2.5),
    Amount("2 %", 1.5, 2.5),
    Amount("over 4 %", 4.0),
    Amount("nearly 7 %", 6.5, 7.0),
)
INCONSISTENCIES = (
    Inconsistency(
        (BY_NAME[4, "resnet18"], BY_NAME[6, "resnet18"]),
        "ResNet18 [2,2,2,2] on CIFAR-100 has rate 3e-4 and dropout 0.1 in both tables, but 62.32 "
        "% layer-wise and 72.45 % globally in Table IV, 66.05 % and 73.13 % in Table VI. A gain "
        "of nearly 7 points by ResNet18_r5 needs the first pair.",
    ),
)


CLAIMS = (
    Claim(
        "competitive",
        "the state-of-the-art layer-wise approach works well for shallow networks, such as the "
        "VGG family, while when it comes to ResNet models with a deeper scale, layer-wise "
        "learning is hard to be competitive with global BP",
        (
            "The gap to global training is smaller for each published VGG than for ResNet18 and "
            "ResNet50 (Figure 1)."
        ),
        tuple(
            Comparison(number(table + 2, resnet, "gap"), number(table, vgg, "gap"))
            for table in (1, 2)
            for resnet in BASE
            for vgg in ("vgg8", "vgg11", "vgg16", "vgg19", "vgg8b")
        ),
    ),
    Claim(
        "resnet-behind",
        "they usually fall behind their counterparts with global BP",
        "Globally trained, ResNet18 and ResNet50 are better than layer-wise.",
        tuple(
            c
            for table in (3, 4)
            for name in BASE
            for c in apart(table, name, "global", "layerwise")
        ),
    ),
    Claim(
        "vgg8b-ahead",
        "outperforms the corresponding BP algorithm in the same experimental settings",
        (
            "Layer-wise, VGG8b is better than trained globally; the paper says it of Nøkland & "
            "Eidnes' networks."
        ),
        tuple(c for table in (1, 2) for c in apart(table, "vgg8b", "layerwise", "global")),
    ),
    Claim(
        "depth-impairs",
        (
            "the classification performance of layer-wise learning is impaired with the increase "
            "of the network depth"
        ),
        (
            "Layer-wise accuracy falls from VGG8 over VGG11 and VGG16 to VGG19, and from "
            "ResNet18 to ResNet50 (Figure 1)."
        ),
        tuple(
            c
            for table in (1, 2)
            for c in falling(table, "vgg8", "vgg11", "vgg16", "vgg19")
            + falling(table + 2, "resnet18", "resnet50")
        ),
    ),
    Claim(
        "gap-grows",
        "the gap between layer-wise and global learning is increased as well at the same time",
        (
            "The gap grows from VGG8 over VGG11 and VGG16 to VGG19, and from ResNet18 to ResNet50 "
            "(Figure 1)."
        ),
        tuple(
            c
            for table in (1, 2)
            for c in falling(table, "vgg19", "vgg16", "vgg11", "vgg8", kind="gap")
            + falling(table + 2, "resnet50", "resnet18", kind="gap")
        ),
    ),
    Claim(
        "vgg11-vgg8",
        "VGG11 leads VGG8 by around 1% in both the layer-wise and global learning cases",
        (
            "More deep convolutions are better: VGG11 above VGG8, layer-wise and globally, on both "
            "data sets."
        ),
        tuple(
            c
            for table in (1, 2)
            for kind in ("layerwise", "global")
            for c in better(table, "vgg11", "vgg8", kind=kind, amount=ABOUT_1)
        ),
    ),
    Claim(
        "vgg19-vgg16",
        "Their results follow the same pattern with that of VGG8 and VGG11",
        (
            "More deep convolutions are better: VGG19 above VGG16, layer-wise and globally, on "
            "both data sets."
        ),
        tuple(
            c
            for table in (1, 2)
            for kind in ("layerwise", "global")
            for c in better(table, "vgg19", "vgg16", kind=kind)
        ),
        (
            "In the paper's tables VGG16 is above VGG19 layer-wise on both data sets: only the "
            "global column has the pattern."
        ),
    ),
    Claim(
        "vgg19-vgg16-e1",
        "VGG16 e1 surpasses VGG19 by 1-2% on average",
        (
            "Equal deep layers, fewer shallow ones are better: VGG19 [2,2,4,4,4] above VGG16_e1 "
            "[3,3,4,4,4]."
        ),
        tuple(c for table in (1, 2) for c in better(table, "vgg19", "vgg16_e1", amount=ONE_TO_TWO)),
        (
            "The sentence names the two the wrong way round: the paper's tables and reasoning have "
            "VGG19 ahead, which is judged."
        ),
        reversed_sentence=True,
    ),
    Claim(
        "vgg19-e1-vgg16-e2",
        "VGG19 e1 leads VGG16 e2 by the same margin on both CIFAR10 and CIFAR100",
        (
            "Equal deep layers, fewer shallow ones are better: VGG19_e1 [3,3,5,5,5] above VGG16_e2 "
            "[4,4,5,5,5]."
        ),
        tuple(
            c for table in (1, 2) for c in better(table, "vgg19_e1", "vgg16_e2", amount=ONE_TO_TWO)
        ),
    ),
    Claim(
        "fewer-shallow",
        "models with fewer shallow convolutions tend to yield higher classification accuracy",
        (
            "Every pair of neighbouring rows with equal deep layers: the one with fewer shallow "
            "layers is better layer-wise."
        ),
        tuple(
            c
            for table in (1, 2)
            for c in falling(table, "vgg19", "vgg16_e1")
            + falling(table, "vgg19_e1", "vgg16_e2")
            + falling(table, "vgg19_e2", "vgg16_e3")
        )
        + tuple(c for table in (3, 4) for c in falling(table, *RESNET50))
        + tuple(
            c
            for table in (5, 6)
            for c in falling(table, "resnet18_r1", "resnet18_r3", "resnet18_r2")
            + falling(table, "resnet18_r4", "resnet18")
            + falling(table, "resnet50_r2", "resnet50_r1", "resnet50")
        ),
    ),
    Claim(
        "deeper-vgg",
        "the layer-wise learning is sensitive to the network hierarchy and depth",
        (
            "Layers added at every stage, VGG16 to VGG16_e3 and VGG19 to VGG19_e3: each step is "
            "worse layer-wise."
        ),
        tuple(c for table in (1, 2) for family in FAMILIES for c in falling(table, *family)),
    ),
    Claim(
        "deeper-vgg8b",
        "the layer-wise learning is sensitive to the network hierarchy and depth",
        "The same of VGG8b to VGG8b_e3.",
        tuple(c for table in (1, 2) for c in falling(table, *VGG8B)),
        (
            "The sentence is general; the paper says nothing of VGG8b alone, whose first added "
            "layers help in its own tables."
        ),
    ),
    Claim(
        "shallow-sensitive",
        "although ResNet18 and its variations increase convolution operations between every two "
        "pooling layers, getting deeper, it seems the classification performance is more "
        "sensitive to the shallow hierarchy",
        (
            "Two blocks more in shallow stages are worse than two more in deep ones: ResNet18_r4 "
            "[1,1,2,2] above ResNet18_r2 [2,2,1,1], layer-wise."
        ),
        tuple(c for table in (5, 6) for c in better(table, "resnet18_r4", "resnet18_r2")),
    ),
    Claim(
        "deeper-resnet18",
        "the layer-wise learning is sensitive to the network hierarchy and depth",
        "Blocks added at every stage, ResNet18 to ResNet18_e2: each step is worse layer-wise.",
        tuple(c for table in (3, 4) for c in falling(table, *RESNET18)),
        (
            "On CIFAR-100 the paper has ResNet18 below ResNet18_e1 by Table IV, and above it by "
            "what Table VI prints for ResNet18."
        ),
    ),
    Claim(
        "deeper-resnet50",
        "Their classification performances, on the opposite, are degenerated",
        (
            "Equal deep layers, more shallow ones are worse: ResNet50 above ResNet50_e1 above "
            "ResNet50_e2."
        ),
        tuple(c for table in (3, 4) for c in falling(table, *RESNET50)),
    ),
    Claim(
        "more-sensitive",
        "the layer-wise learning could be more sensitive as a lack of consistent constraint "
        "compared with global learning algorithms",
        (
            "Added layers cost layer-wise training more than global: the gap is larger in the last "
            "variation than in the first."
        ),
        tuple(
            Comparison(
                number(table + shift, names[-1], "gap"), number(table + shift, names[0], "gap")
            )
            for table in (1, 2)
            for shift, names in (
                (0, FAMILIES[0]),
                (0, FAMILIES[1]),
                (0, VGG8B),
                (2, RESNET18),
                (2, RESNET50),
            )
        ),
    ),
    Claim(
        "acceleration",
        (
            "the advantages of the proposed downsampling acceleration in improving the performance "
            "of layer-wise learning"
        ),
        "ResNet18_r4 above ResNet18 and ResNet50_r4 above ResNet50, layer-wise on both data sets.",
        tuple(c for table in (5, 6) for name in BASE for c in better(table, f"{name}_r4", name)),
    ),
    Claim(
        "gap-closes",
        "The scheme is proved to be highly-effective and comparative to global back propagation",
        "Acceleration narrows the gap to global training: r4 of ResNet18 and ResNet50, and on "
        "CIFAR-100 the paper's best, r5 and r2.",
        tuple(
            Comparison(number(table, base, "gap"), number(table, variant, "gap"))
            for table, base, variant in (
                (5, "resnet18", "resnet18_r4"),
                (5, "resnet50", "resnet50_r4"),
                (6, "resnet18", "resnet18_r4"),
                (6, "resnet18", "resnet18_r5"),
                (6, "resnet50", "resnet50_r4"),
                (6, "resnet50", "resnet50_r2"),
            )
        ),
    ),
    Claim(
        "r4-best",
        (
            "the best layer-wise result of ResNet18 family is reported with the hierarchical "
            "structure of [1,1,2,2]"
        ),
        "ResNet18_r4 above every other ResNet18 of Table V, layer-wise.",
        better(5, "resnet18_r4", "resnet18", "resnet18_r1", "resnet18_r2", "resnet18_r3"),
    ),
    Claim(
        "r3-r2",
        "more intensive convolution operation in shallow layers leads to worse performance",
        "ResNet18_r3 [2,1,1,1] above ResNet18_r2 [2,2,1,1], layer-wise on CIFAR-10.",
        better(5, "resnet18_r3", "resnet18_r2"),
    ),
    Claim(
        "r4-r1",
        (
            "the deeper convolutions in the deeper part of the network brings about equal or even "
            "better results"
        ),
        "ResNet18_r4 [1,1,2,2] above ResNet18_r1 [1,1,1,1], layer-wise on CIFAR-10.",
        better(5, "resnet18_r4", "resnet18_r1"),
        "Equal is no more than undecided here.",
    ),
    Claim(
        "resnet50-r4",
        "increases the classification performance by a large margin of over 4%",
        (
            "ResNet50_r4 [1,2,8,5] above ResNet50 [3,4,6,3], layer-wise on CIFAR-10; both have 16 "
            "blocks."
        ),
        better(5, "resnet50_r4", "resnet50", amount=OVER_4),
    ),
    Claim(
        "least-gap",
        "it is the method that obtains the least margin of performance with the corresponding "
        "global learning method by roughly 0.5%",
        (
            "The gap to global training is smaller for ResNet50_r4 than for every other row of "
            "Table V."
        ),
        tuple(
            Comparison(Number(row, "gap"), number(5, "resnet50_r4", "gap"))
            for row in ROWS
            if row.table == 5 and row.name != "resnet50_r4"
        ),
        "The gap that the paper's table gives is 0.68 points.",
    ),
    Claim(
        "ahead-cifar10",
        "the performance of both ResNet18 and ResNet50 trained in the way of layer-wise learning "
        "fall behind that of ResNet18 r4 and ResNet50 r4 throughout the entire inference "
        "procedure",
        (
            "ResNet18_r4 and ResNet50_r4 above ResNet18 and ResNet50 after every epoch (Figure 4), "
            "judged where the lead is least."
        ),
        tuple(
            c
            for name in ("resnet18_r4", "resnet50_r4")
            for c in better(5, name, *BASE, kind="curve")
        ),
    ),
    Claim(
        "sharper-drop",
        "the test errors of models with pooling positioned ahead have a sharper drop in the "
        "first 100 epochs than the other two",
        (
            "ResNet18_r4 and ResNet50_r4 are better than ResNet18 and ResNet50 after the first "
            "quarter of the epochs (Figure 4)."
        ),
        tuple(
            c
            for name in ("resnet18_r4", "resnet50_r4")
            for c in better(5, name, *BASE, kind="quarter")
        ),
        (
            "All start from guessing, so the drop is compared by where it leads; 100 of the "
            "paper's 400 epochs are a quarter."
        ),
    ),
    Claim(
        "clearly-lower",
        (
            "the red and purple curves rest on a state that is clearly lower than the yellow and "
            "blue ones"
        ),
        (
            "After the last epoch, ResNet18_r4 and ResNet50_r4 are above ResNet18 and ResNet50, "
            "layer-wise on CIFAR-10."
        ),
        tuple(c for name in ("resnet18_r4", "resnet50_r4") for c in better(5, name, *BASE)),
    ),
    Claim(
        "best-cifar100",
        "the best results appear in the cases of ResNet18 r5 and ResNet50 r2",
        (
            "ResNet18_r5 above every other ResNet18 of Table VI, ResNet50_r2 above every other "
            "ResNet50, layer-wise."
        ),
        better(
            6, "resnet18_r5", "resnet18", "resnet18_r1", "resnet18_r2", "resnet18_r3", "resnet18_r4"
        )
        + better(6, "resnet50_r2", "resnet50", "resnet50_r1", "resnet50_r3", "resnet50_r4"),
    ),
    Claim(
        "r1-r3",
        (
            "The comparison between ResNet18 r1 and ResNet18 r3 verifies that the downsampling "
            "acceleration has a positive impact"
        ),
        "ResNet18_r1 [1,1,1,1] above ResNet18_r3 [2,1,1,1], layer-wise on CIFAR-100.",
        better(6, "resnet18_r1", "resnet18_r3"),
    ),
    Claim(
        "r5-base",
        (
            "ResNet18 and ResNet18 r5 have the same number of convolution layers while ResNet18 r5 "
            "leads the former by nearly 7%"
        ),
        (
            "ResNet18_r5 [1,1,2,4] above ResNet18 [2,2,2,2], layer-wise on CIFAR-100; both have 8 "
            "blocks."
        ),
        better(6, "resnet18_r5", "resnet18", amount=NEARLY_7),
        (
            "Within Table VI it is 3.07 points; nearly 7 (6.80) only against the 62.32 % that "
            "Table IV prints for ResNet18."
        ),
    ),
    Claim(
        "resnet50-cifar100",
        (
            "ResNet50 r2 and ResNet50 r4 obtain better results compared with the base model of "
            "ResNet50 by a margin of 2%"
        ),
        "ResNet50_r2 and ResNet50_r4 above ResNet50, layer-wise on CIFAR-100.",
        tuple(
            c
            for name in ("resnet50_r2", "resnet50_r4")
            for c in better(6, name, "resnet50", amount=TWO)
        ),
    ),
    Claim(
        "ahead-cifar100",
        (
            "ResNet18 r4 and ResNet50 r2 maintain the same advantage over the other two with "
            "simple layer-wise learning"
        ),
        (
            "ResNet18_r4 and ResNet50_r2 above ResNet18 and ResNet50 after every epoch (Figure 5), "
            "judged where the lead is least."
        ),
        tuple(
            c
            for name in ("resnet18_r4", "resnet50_r2")
            for c in better(6, name, *BASE, kind="curve")
        ),
    ),
    Claim(
        "separable-deeper",
        "the separability of feature space is enhanced when the network goes deeper",
        (
            "In a layer-wise run of any row a linear probe behind the last convolution is better "
            "than one behind the first, after the last epoch."
        ),
        tuple(
            Comparison(Number(row, "last probe"), Number(row, "first probe")) for row in DISTINCT
        ),
        "The paper prints no number of a unit.",
    ),
    Claim(
        "reason",
        "the poor separability of features produced in shallow layers is the main reason that "
        "impedes the layer-wise learning getting a deeper scale",
        "An explanation of the orders above; no accuracy could decide it.",
        (),
        "Orders that hold agree with it, but would agree with other explanations too.",
    ),
)
