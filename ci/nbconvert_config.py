"""nbconvert's settings for README.md: `make readme`."""

c = get_config()  # noqa: F821  (nbconvert defines it)
c.NbConvertApp.export_format = "markdown"
c.NbConvertApp.output_base = "README"
c.TemplateExporter.extra_template_basedirs = ["ci/nbconvert"]
c.TemplateExporter.template_name = "readme"
c.ClearOutputPreprocessor.enabled = True
