"""The Sample Data module, as far as extensions register their data there (Modules/Scripted/SampleData/SampleData.py)."""

import slicer


class SampleDataSource:
    """Two sources are equal if their texts are: those of two functions differ, even of the same one made twice."""

    def __init__(self, **values) -> None:
        self.__dict__.update(values)

    def __eq__(self, other) -> bool:
        return str(self) == str(other)

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self.__dict__.items())


class SampleDataLogic:
    @staticmethod
    def registerCustomSampleDataCategory(category: str, title: str) -> None:
        pass

    @staticmethod
    def registerCustomSampleDataSource(category: str = "Custom", **values) -> None:
        if not hasattr(slicer.modules, "sampleDataSources"):
            slicer.modules.sampleDataSources = {}
        sources = slicer.modules.sampleDataSources.setdefault(category, [])
        source = SampleDataSource(**values)
        if source not in sources:
            sources.append(source)
