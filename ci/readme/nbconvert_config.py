"""nbconvert's settings for README.md: `make readme`."""

c = get_config()  # noqa: F821  (nbconvert defines it)
c.NbConvertApp.export_format = "markdown"
c.NbConvertApp.output_base = "README"
c.TemplateExporter.extra_template_basedirs = ["ci/readme"]
c.TemplateExporter.template_name = "template"
c.ClearOutputPreprocessor.enabled = True
