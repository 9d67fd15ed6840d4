"""The 38 data sets that open_clip's tables average over, with the measure that counts of each.

They are the tasks of DataComp that have one (github.com/mlfoundations/datacomp, tasklist.yml: keys, names, sizes, main
metrics; FairFace and UTKFace have none), and the columns of open_clip's docs/openclip_results.csv. In that table
DFN ViT-H/14 has .6961 and .8344 on ImageNet, which are the 69.6 and 83.4 of the report's Figure 1: its "38 CLIP Bench"
is taken to be this.

FMoW counts the worst region. DataComp's code means to leave out the region "Other" (of four pictures), but does not:
the published numbers contain it (several are 0.0000), and so does `acc_worst_region` here; `acc_worst_named_region` is
WILDS' definition without it.
"""

from __future__ import annotations

import dataclasses

# What the report gives a number for without saying what it is: never compared with anything.
UNDEFINED = {"general_object_14": "the report does not say which 14 benchmarks these are"}
AVERAGE = "suite_38"  # name of the average among targets


@dataclasses.dataclass(frozen=True)
class Task:
    """key: DataComp's.   title: open_clip's column.   metric: what counts.   size: samples.
    also: other names that public tools give its folder.
    """

    key: str
    title: str
    size: int
    metric: str = "acc1"
    also: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its folder, the commonest first."""
        return (self.key, self.key.rpartition("/")[2], *self.also)


_RECALL = "mean_per_class_recall"
SUITE = (
    Task("imagenet1k", "ImageNet 1k", 50_000),
    Task("vtab/caltech101", "Caltech-101", 6_085, _RECALL),
    Task("cifar10", "CIFAR-10", 10_000),
    Task("vtab/cifar100", "CIFAR-100", 10_000),
    Task("vtab/clevr_count_all", "CLEVR Counts", 15_000),
    Task("vtab/clevr_closest_object_distance", "CLEVR Distance", 15_000),
    Task("country211", "Country211", 21_100),
    Task("vtab/dtd", "Describable Textures", 1_880),
    Task("vtab/eurosat", "EuroSAT", 5_400),
    Task("fgvc_aircraft", "FGVC Aircraft", 3_333, _RECALL),
    Task("food101", "Food-101", 25_250),
    Task("gtsrb", "GTSRB", 12_630),
    Task("imagenet_sketch", "ImageNet Sketch", 50_889),
    Task("imagenetv2", "ImageNet v2", 10_000),
    Task("imagenet-a", "ImageNet-A", 7_500),
    Task("imagenet-o", "ImageNet-O", 2_000),
    Task("imagenet-r", "ImageNet-R", 30_000),
    Task("vtab/kitti_closest_vehicle_distance", "KITTI Vehicle Distance", 711),
    Task("mnist", "MNIST", 10_000),
    Task("objectnet", "ObjectNet", 18_574),
    Task("vtab/flowers", "Oxford Flowers-102", 6_149, _RECALL),
    Task("vtab/pets", "Oxford-IIIT Pet", 3_669, _RECALL),
    Task("voc2007", "Pascal VOC 2007", 14_976),
    Task("vtab/pcam", "PatchCamelyon", 32_768),
    Task("renderedsst2", "Rendered SST2", 1_821),
    Task("vtab/resisc45", "RESISC45", 6_300),
    Task("cars", "Stanford Cars", 8_041),
    Task("stl10", "STL-10", 8_000),
    Task("sun397", "SUN397", 108_754),
    Task("vtab/svhn", "SVHN", 26_032),
    Task("retrieval/flickr_1k_test_image_text_retrieval", "Flickr", 1_000, "mean R@1", ("flickr30k",)),
    Task("retrieval/mscoco_2014_5k_test_image_text_retrieval", "MSCOCO", 5_000, "mean R@1", ("mscoco_captions",)),
    Task("misc/winogavil", "WinoGAViL", 3_563, "jaccard_10-12"),
    Task("wilds/iwildcam", "iWildCam", 42_791, "macro_f1"),
    Task("wilds/camelyon17", "Camelyon17", 85_054),
    Task("wilds/fmow", "FMoW", 22_108, "acc_worst_region"),
    Task("fairness/dollar_street", "Dollar Street", 3_503, "acc5_worst_income"),
    Task("fairness/geode", "GeoDE", 12_488, "acc_worst_region"),
)

# Facts of a sample (columns of its npy), by which groups are made: task -> {measure: (column, accuracy within the
# group, groups that are left out)}. DataComp's eval_utils/wilds_eval.py and fairness_eval.py.
GROUPS: dict[str, dict[str, tuple[int, int, tuple[int, ...]]]] = {
    "wilds/fmow": {"acc_worst_region": (0, 1, ()), "acc_worst_named_region": (0, 1, (5,))},
    "fairness/dollar_street": {"acc5_worst_income": (0, 5, ())},
    "fairness/geode": {"acc_worst_region": (0, 1, ())},
}


def task_of(name: str) -> Task | None:
    """The task of the suite that goes by this name, or None."""
    bare = name.removeprefix("wds_").removesuffix("_test")
    for task in SUITE:
        if name in task.names or bare in [n.replace("/", "-") for n in task.names]:
            return task
    return None
